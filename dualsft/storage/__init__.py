"""The file system.

In: a path as a user gives it, and what is to be written there. Out: the place that it means, and a file that stands
under its name only when it is whole and synced.
"""
