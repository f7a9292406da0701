"""Gymnasium environments for multi-turn search question answering. Importing registers the ids."""
