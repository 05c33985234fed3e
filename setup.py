"""Maps the top-level folders to one import package, ``flashpte``; everything else is in pyproject.toml.

A hand-written list of packages works in an editable install, but the wheel would miss a new subpackage. So this file
collects each room's subpackages.
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
