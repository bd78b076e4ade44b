"""What is looked at before anything expensive begins: a machine, its link to a server, data, a model, a plan."""
