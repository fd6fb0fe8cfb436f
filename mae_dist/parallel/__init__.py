"""The mesh, the one table of sharding rules, and the processes of a run."""
