"""Proofs: coverage, algebra on real rows, parity with a control, and the miniature."""
