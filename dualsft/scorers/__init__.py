"""Scorers: a scorer is a choice of the direction u in M_ij = g_ij u_j, and nothing else."""

from dualsft.scorers.base import ParameterStatistics, Scorer
from dualsft.scorers.first_order import FirstOrder

__all__ = ["FirstOrder", "ParameterStatistics", "Scorer"]
