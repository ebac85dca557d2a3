"""The documentation site: what of it is made from the code, the notebook and files outside docs/ (`mkdocs.yml`)."""
