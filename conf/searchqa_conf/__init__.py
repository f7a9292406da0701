"""Hydra configuration groups, found as pkg://searchqa_conf."""
