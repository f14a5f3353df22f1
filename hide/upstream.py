"""What other packages say while they are imported that is of no consequence here, left out by its text.

Everything else that they say is heard. In place before transformers is loaded, which loads torchao where that is
installed: of kernels for other machines, and of a call of torch that will change.
"""

import logging
import re

# Logger -> the text of its messages that are left out.
_TEXTS = {
    "torchao": re.compile(r"Failed to load .*torchao\W_C_\w+"),
    "torch.utils._pytree": re.compile(r"Calling register_constant\(\) on Enum subclasses is deprecated"),
}


def matters(record: logging.LogRecord) -> bool:
    """Whether a record of one of these loggers is to be heard."""
    return not _TEXTS[record.name].search(record.getMessage())


for _name in _TEXTS:
    logging.getLogger(_name).addFilter(matters)
