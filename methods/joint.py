"""All tasks at once: the upper bound that a sequence is compared with."""

from methods.method import Method


class Joint(Method):
    merges_tasks = True
