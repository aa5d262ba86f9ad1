"""Tests of the mover. Servers are real ones (``tests.servers``); faults come from wrappers around real parts."""
