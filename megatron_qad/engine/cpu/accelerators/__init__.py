"""Faster CPU demos: nothing here is needed for a right result, and a GPU never takes it."""
