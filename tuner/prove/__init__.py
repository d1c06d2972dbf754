"""Proofs on a user's own config and data that spreading, packing and scaling do what they say."""
