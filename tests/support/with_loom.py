"""Run a module with the packages of a second environment behind those of this one.

python with_loom.py SITE_PACKAGES MODULE ARGUMENTS…

It is as though loom was installed here: where both environments have a package, this one's is imported.
"""

import runpy
import site
import sys

_, site_packages, module, *arguments = sys.argv
sys.path.pop(0)  # the folder of this file
site.addsitedir(site_packages)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
