"""Language-model agents for the searchqa environments."""
