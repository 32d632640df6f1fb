"""Account for shared memory in the memory that Dask reports, limits and spills."""
