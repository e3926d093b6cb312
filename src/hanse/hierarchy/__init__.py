"""A weighted mean by a tree of processes that read what arrives where it lies, in shared memory (LIFL)."""
