"""Connections between the processes of an application: rows and requests. No HTTP."""
