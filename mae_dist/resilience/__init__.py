"""Preemption signals, the watchdog, Ctrl-C between two steps, and the lock of a workdir."""
