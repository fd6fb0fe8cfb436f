"""The mesh, sharding rules and shardings, and the processes of a run."""
