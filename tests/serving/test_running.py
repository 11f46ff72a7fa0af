import subprocess
import sys


def test_what_was_loaded_is_left_alone_and_what_comes_later_is_not():
    code = """
import gc, weakref
from astrolabe_diffusers.serving.running import leave_loaded_alone

class Node:
    pass

def circle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

gc.disable()
garbage, loaded = circle(), [[] for _ in range(100_000)]
leave_loaded_alone()
assert garbage() is None  # nothing is kept that nobody needs
assert gc.get_freeze_count() > 100_000 > len(gc.get_objects())
later = circle()
gc.collect()
assert later() is None and len(loaded) == 100_000
"""
    subprocess.run([sys.executable, "-c", code], check=True)
