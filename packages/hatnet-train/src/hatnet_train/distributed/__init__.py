"""The processes of a launch: environments, rendezvous, heartbeat, collectives, preflight."""
