"""`report`: selections, fits, evaluations, audits and comparisons -> one HTML page and its figures.

A module for each section of the page says what it reads and what it shows, as `blocks`; `pictures` draws the figures,
and `page` alone knows HTML.
"""
