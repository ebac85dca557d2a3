"""Scorers: a scorer is a choice of the direction u in M_ij = g_ij u_j, and nothing else.

In: for each parameter its weights, the validation gradient, the preconditioner and other statistics on request
(`ParameterStatistics`). Out: the parameter's part of u.
"""

from dualsft.scorers.base import ParameterStatistics, Scorer, SecondOrderScorer, Statistic
from dualsft.scorers.diagonal_fisher import DiagonalFisher
from dualsft.scorers.first_order import FirstOrder
from dualsft.scorers.hessian_vector import HessianVector

__all__ = [
    "DiagonalFisher",
    "FirstOrder",
    "HessianVector",
    "ParameterStatistics",
    "Scorer",
    "SecondOrderScorer",
    "Statistic",
]
