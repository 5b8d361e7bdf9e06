"""What a compensation for skipped experts costs: multiply-adds, numbers on the wire. Letters: `ubsmoe.costs.flops`."""

from dataclasses import dataclass

from ubsmoe.costs.shape import ModelShape


@dataclass(frozen=True)
class Skipped:
    """What stands for the skipped experts at K < `k_max`: the form, its rank r, and n slices to an expert.

    `least_top_k` is the smallest K that a budget may buy: 0 where something stands for all experts from the first round on.
    """

    form: str
    rank: int
    slices: int
    k_max: int
    least_top_k: int = 0

    def multiply_adds(self, shape: ModelShape, top_k: int) -> int:
        """Per token and layer, forward, as they are computed: of a map r (2 h + M), of what is kept per expert all M of it.

        >>> Skipped("map", 64, 1, 8).multiply_adds(ModelShape(1, 1, 2048, 1024, 64, 8, 16, 16, 128, vocab=10), 1)
        266240
        """
        h, experts = shape.hidden, shape.num_experts
        if top_k >= self.k_max:
            return 0
        return {
            "map": self._rank(shape) * (2 * h + experts),
            "stand_ins": min(self.rank, h) * h * (1 + experts),
            "elementwise": experts * h,
            "constant": experts * h,
            "none": 0,
        }[self.form]

    def runs(self, top_k: int) -> int:
        """Experts per token, whole or in slices."""
        return top_k * self.slices if top_k * self.slices <= self.k_max and top_k < self.k_max else top_k

    def numbers(self, shape: ModelShape) -> int:
        """Numbers of one K, over all layers."""
        h, experts = shape.hidden, shape.num_experts
        per_layer = {
            "map": self._rank(shape) * (2 * h + experts) + h,
            "stand_ins": min(self.rank, h) * h * (1 + experts) + experts * h,
            "elementwise": experts * h,
            "constant": experts * h,
            "none": 0,
        }[self.form]
        return shape.num_moe_layers * per_layer

    def channels(self, shape: ModelShape) -> int:
        """Numbers that say which channels a slice keeps, over all layers."""
        return (self.slices > 1) * shape.num_moe_layers * shape.num_experts * (shape.expert_width // self.slices)

    def _rank(self, shape: ModelShape) -> int:
        return min(self.rank, shape.hidden)
