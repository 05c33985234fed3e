"""Maps the top-level folders to one import package, ``flashpte``; everything else is in pyproject.toml.

``package_dir`` with a list of packages spelled out works in an editable install and then misses a new
subpackage in the wheel, so each room's subpackages are collected here.
"""

from setuptools import find_packages, setup

ROOMS = ("passes", "kernels", "export")

package_dir = {"flashpte": "package"}
packages = ["flashpte"]
for room in ROOMS:
    package_dir[f"flashpte.{room}"] = room
    packages.append(f"flashpte.{room}")
    packages += [f"flashpte.{room}.{name}" for name in find_packages(room)]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"flashpte": ["py.typed"], "flashpte.export": ["**/*.cpp"]},
)
