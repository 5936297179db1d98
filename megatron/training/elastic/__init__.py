"""Elastic training: shares of the parameter tokens as models of their own."""
