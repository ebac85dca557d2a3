"""The tiny world that the tests share: models, data, jobs, ranks and faults.

=================  ==================================================================================
`tokenizers`       Tokenizers trained on a few sentences, and chat templates.
`models`           A tiny Llama, its tokenizer and its folder.
`data`             Records, files of them, random batches and masks.
`jobs`             A model with its pool and validation set, and what is done with them: select, fit.
`fits`             Fits that are compared, on any number of ranks.
`ranks`            Functions that run on several processes, as the ranks of a job.
`faults`           Kills, values that are not finite, and memory that runs out.
=================  ==================================================================================

Other architectures and examples are in `tests.cases`, the slow computations that tests compare with in
`tests.references`.
"""
