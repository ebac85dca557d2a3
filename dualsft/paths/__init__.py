"""Paths: a path is a choice of points θ_k in weight space, and of a direction u_k at each, and nothing else.

In: a training that a path advances step by step, and the statistics of a piece of it. Out: the points, and each
parameter's part of the directions; M_ij = Σ_k g_ij(θ_k) (u_k)_j follows.
"""

from dualsft.paths.base import PathTraining, Piece, PieceRows, ScoringPath
from dualsft.paths.pool import PoolPath
from dualsft.paths.target import TargetPath

__all__ = ["PathTraining", "Piece", "PieceRows", "PoolPath", "ScoringPath", "TargetPath"]
