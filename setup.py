"""Build the C library of ``dask_shm_plugin.births``, if there is a C compiler. All metadata stand in ``setup.cfg``."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel


class BuildLibrary(build_ext):
    """Builds a plain library: it is no Python module, so its name has no tag of a Python version."""

    def get_ext_filename(self, fullname):
        """Return the file of the library."""
        return fullname.replace(".", "/") + ".so"


class WheelForAnyPython(bdist_wheel):
    """Makes one wheel for all versions of Python."""

    def get_tag(self):
        """Return the wheel's tag: that of the platform only."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "dask_shm_plugin.births._born",
            ["dask_shm_plugin/births/_born.c"],
            extra_compile_args=["-O2", "-pthread"],
            extra_link_args=["-pthread", "-s"],
            optional=True,  # without it, arrays are allocated as usual
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
