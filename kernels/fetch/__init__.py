"""A small copy from host memory that does not wait for the copy engine."""
