"""The record of a training on disk: Parquet files that pandas, polars, DuckDB, R and Spark read as they are."""
