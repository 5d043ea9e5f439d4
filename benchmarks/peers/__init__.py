"""Other engines beside Quire: each in an environment and a process of its own, in turn with Quire in one run."""
