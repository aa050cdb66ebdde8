r"""Couplings: which source point goes with which data point.

Given n source points and n data points, a coupling draws pairs (i, j): x0[i] is carried to x1[j]. With the
uniform weights 1/n on both sides and the cost C_ij = |x0_i - x1_j|^2, optimal transport finds

    P = argmin <P, C> - reg H(P)   subject to   P 1 = 1/n,  P' 1 = 1/n                             (1)

with the entropy H(P) = -sum_ij P_ij log P_ij. Pairs are indices, so labels and anything else follow the data; the
data keep their order, j = 0 ... n - 1, wherever the method allows.

In every coupling but `Independent`, x0 depends on x1, and so on a label of x1. A network that takes the label
would then be trained on another source distribution than the one it is sampled from: such pairs are refused, and
`ClasswiseOT` is the cure.

    exact             MinibatchOT, OTPlanWithReplacement      (1) with reg = 0
    entropic          Entropic, SchrodingerBridgeCoupling     (1) with reg > 0
    unbalanced        UnbalancedOT                            (1) with a price on P' 1 instead of a constraint
    conditional       ClasswiseOT, C2OT                       a cost for pairs whose conditions differ
    semidiscrete      SemidiscreteOT                          (1) between the distribution of x0 and the whole data set

Source: Tong et al. 2024, arXiv:2302.00482, secs. 3 and 4; Pooladian et al. 2023, arXiv:2304.14772.
"""

from fmlightning.flow.couplings.conditional import C2OT, ClasswiseOT
from fmlightning.flow.couplings.coupling import (
    Conditions,
    Coupling,
    Independent,
    Indices,
    Matrix,
    Pairs,
    squared_distances,
)
from fmlightning.flow.couplings.entropic import Entropic, SchrodingerBridgeCoupling, sinkhorn
from fmlightning.flow.couplings.exact import MinibatchOT, OTPlanWithReplacement, assignment
from fmlightning.flow.couplings.potential import Potential
from fmlightning.flow.couplings.semidiscrete import SemidiscreteOT
from fmlightning.flow.couplings.unbalanced import UnbalancedOT

__all__ = [
    "C2OT",
    "ClasswiseOT",
    "Conditions",
    "Coupling",
    "Entropic",
    "Independent",
    "Indices",
    "Matrix",
    "MinibatchOT",
    "OTPlanWithReplacement",
    "Pairs",
    "Potential",
    "SchrodingerBridgeCoupling",
    "SemidiscreteOT",
    "UnbalancedOT",
    "assignment",
    "sinkhorn",
    "squared_distances",
]
