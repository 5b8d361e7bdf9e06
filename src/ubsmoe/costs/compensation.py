"""What a compensation for skipped experts costs: multiply-adds, bytes on the wire and in memory. Letters: `ubsmoe.costs.flops`."""

from dataclasses import dataclass

from ubsmoe.costs.shape import FLOAT32, INT64, ModelShape


@dataclass(frozen=True)
class Skipped:
    """What stands for the skipped experts at K < `k_max`: the form, its rank r, and n slices to an expert.

    `least_top_k` is the smallest K that a budget may buy: 0 where something stands for all experts from the first round on.
    A client below K_max is sent what stands for its own K; everybody gets `elastic` of them where budgets are elastic. A client of
    K_max sends the sums of `sums` smaller K where maps are fitted from clients' sums.
    """

    form: str
    rank: int
    slices: int
    k_max: int
    least_top_k: int = 0
    elastic: int = 0
    sums: int = 0

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

    def sent_bytes(self, shape: ModelShape) -> int:
        """Bytes that a client is sent: numbers in float32, channels in int64."""
        return (self.elastic or 1) * FLOAT32 * self.numbers(shape) + INT64 * self.channels(shape)

    def held_bytes(self, shape: ModelShape, top_k: int, dtype_bytes: int) -> int:
        """Bytes in a client's memory: what it was sent, in the base's dtype beside that, and one expert's matrix as a slice.

        >>> skipped = Skipped("map", 64, 2, 8)  # a map of 64 (2 2048 + 64) + 2048 numbers, 64 experts of 512 channels
        >>> shape = ModelShape(1, 1, 2048, 1024, 64, 8, 16, 16, 128, vocab=10)
        >>> skipped.held_bytes(shape, 1, 2) - (4 + 2) * 268288 - 3 * 8 * 64 * 512  # 2048 x 2 x 512 in bfloat16
        4194304
        """
        if top_k >= self.k_max and not self.elastic:
            return 2 * self.sums_bytes(shape)  # as they are summed, and as they leave
        placed = dtype_bytes if dtype_bytes < FLOAT32 else 0  # float32 is used where it was received
        numbers = (self.elastic or 1) * self.numbers(shape)
        columns = INT64 * shape.up_matrices * self.channels(shape)  # for autograd, of every layer
        matrix = dtype_bytes * shape.hidden * shape.up_matrices * (shape.expert_width // self.slices)
        least = 1 if self.elastic else top_k
        return self.sent_bytes(shape) + placed * numbers + (columns + matrix) * (self.runs(least) > least)

    def sums_bytes(self, shape: ModelShape) -> int:
        """Bytes of the sums that a client of K_max sends: per layer and K d^2 + d h + d + h + 2 numbers for d = h + M features.

        >>> Skipped("map", 64, 1, 8, sums=3).sums_bytes(ModelShape(1, 1, 2, 1024, 3, 3, 16, 16, 128, vocab=10)) / (3 * 8)
        44.0
        """
        h, d = shape.hidden, shape.hidden + shape.num_experts
        return INT64 * shape.num_moe_layers * self.sums * (d * d + d * h + d + h + 2)

    def channels(self, shape: ModelShape) -> int:
        """Numbers that say which channels a slice keeps, over all layers."""
        return (self.slices > 1) * shape.num_moe_layers * shape.num_experts * (shape.expert_width // self.slices)

    def _rank(self, shape: ModelShape) -> int:
        return min(self.rank, shape.hidden)
