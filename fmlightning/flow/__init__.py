"""The mathematics of flow matching: tensors in, tensors out, plain torch.

A public class is named by this package wherever it is written down: `fmlightning.flow.Linear`. The file it lies in may
change; configs, checkpoints and hashes do not. What there is stands in `__init__.pyi`, and is imported when it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
