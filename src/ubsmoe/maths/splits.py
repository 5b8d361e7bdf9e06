"""Factors of one update turned against each other: the product stays.

Legend: s B A is an update, A [r, I], B [O, r], r <= min(O, I). Everything in float64, for every expert at once.

    principal    s B A = s U Sigma V^T,                       A <- V^T,    B <- U Sigma
    aligned      Q = argmin |Q A - A_ref|,  Q^T Q = 1,        A <- Q A,    B <- B Q^T
"""

import torch

from ubsmoe.maths.lora import LoraPair


def principal(pair: LoraPair) -> LoraPair:
    """The update's own singular vectors as factors. A has r orthonormal rows even where the update has less rank.

    The rows of A span what they spanned before: V^T of B A lies in the rows of A, and what it leaves free there is filled up.

    >>> split = principal(LoraPair(a=torch.tensor([[0.0, 3.0], [4.0, 0.0]]), b=torch.eye(2)))
    >>> split.a, split.b
    (tensor([[1., 0.],
            [0., 1.]]), tensor([[0., 3.],
            [4., 0.]]))
    """
    q, triangle = torch.linalg.qr(pair.a.double().mT)  # A = triangle^T q^T
    u, sigma, vt = torch.linalg.svd(pair.b.double() @ triangle.mT, full_matrices=False)
    b = u * sigma[..., None, :]
    low, high = b.amin(dim=-2, keepdim=True), b.amax(dim=-2, keepdim=True)
    sign = torch.where(high >= -low, 1.0, -1.0).to(b.dtype)  # LAPACKs differ in signs
    return LoraPair((sign.mT * (vt @ q.mT)).to(pair.a.dtype), (b * sign).to(pair.b.dtype), pair.scale)


def aligned(pair: LoraPair, reference: LoraPair) -> LoraPair:
    """The same update, turned so that its A comes as near as it can to the reference's: orthogonal Procrustes.

        A_ref A^T = U Sigma V^T,    Q = U V^T

    Source: Schoenemann 1966.

    >>> turned = LoraPair(a=torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), b=torch.tensor([[2.0, 1.0]]))
    >>> aligned(turned, LoraPair(a=torch.eye(2), b=torch.zeros(1, 2))).b
    tensor([[-1.,  2.]])
    """
    u, _, vt = torch.linalg.svd(reference.a.double() @ pair.a.double().mT)
    turn = u @ vt
    a, b = turn @ pair.a.double(), pair.b.double() @ turn.mT
    return LoraPair(a.to(pair.a.dtype), b.to(pair.b.dtype), pair.scale)
