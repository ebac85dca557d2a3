"""The interaction matrix M_ij = g_ij u_j, never formed: mathematics alone, without configuration keys or files.

In: a model, batches and directions u. Out: row sums (data utilities), column sums (parameter importances), and
whatever else a pass over batches yields: Hessian-vector products, norms and sketches of single gradients.
"""
