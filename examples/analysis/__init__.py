"""Analysis of tables, Python sources and texts in `inputs`, without a language model."""
