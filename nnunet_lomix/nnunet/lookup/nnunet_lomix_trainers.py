"""The one module that nnU-Net's trainer look-up imports: it hands over :mod:`nnunet_lomix.trainers`.

nnU-Net imports every file of this folder as a top-level module and forgets the module afterwards. The
trainers therefore live elsewhere, in an ordinary package: every look-up gives the same class, which can
be pickled, inspected and subclassed. Nothing else may be put into this folder.
"""

try:
    from nnunet_lomix.trainers import find_trainer as __getattr__  # noqa: F401  nnU-Net asks hasattr(module, name)
except ModuleNotFoundError as error:
    # a process of another environment, which inherited the variable that names this folder
    if error.name != "nnunet_lomix":
        raise
