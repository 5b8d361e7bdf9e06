"""UB-SMoE: federated averaging with Dynamic Modulated Routing (DMR) and the Universal Pseudo-Gradient (PG).

A round, as in Figure 1 of the paper:

    (1) the server knows the utilization   u_i = sum_c p_c a_{c,i} / tokens_c
    (2) clients route with                 m_i = s_i + phi_i on the N_p best experts of each token        modulation.py
    (3) each activates                     K_c = max(1, floor(K_max beta_c)) experts
    (4) inactive experts receive pseudo-gradients during local training                                   pseudo_gradient.py
    (5) clients return updates and counts; theta <- theta + sum_c p_c (theta_c - theta)                   fedavg.py
        phi <- zeta phi + (1 - zeta) tanh(u* / (u_i + eps) - 1),  u* = mean_i u_i

The paper states steps 1-5, the tanh target and momentum, and that phi may also be trained with a range penalty. What it leaves open
and what we chose stands on top of each part's file. Nothing beat the defaults beyond the noise (docs/tables.md, Screening).
`dmr = false` or `pg = false` switch a part off, and any method can have either part.

Source: UB-SMoE (arXiv 2605.16690).
"""

from dataclasses import replace

from ubsmoe.maths.pseudo_gradient import PseudoGradient
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Method, RunShape
from ubsmoe.methods.modulation import Modulation, with_modulation
from ubsmoe.methods.pseudo_gradient import with_pseudo_gradient


def ubsmoe(
    shape: RunShape, *, dmr: Modulation | None = Modulation(), pg: PseudoGradient | None = PseudoGradient()
) -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        dmr: the modulation of routers, [method.dmr].
        pg: the pseudo-gradient, [method.pg].

    Raises:
        ValueError: for a setting that does not fit the run.
    """
    method = fedavg(shape)
    if dmr:
        method = with_modulation(method, shape, dmr)
    if pg:
        method = with_pseudo_gradient(method, shape, pg)
    return replace(method, name="ubsmoe")
