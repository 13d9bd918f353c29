"""ms-swift loads this file by its path (`--external_plugins`); it registers the callback `siftune`.

The selector's options are those of the YAML file that SIFTUNE_CONFIG names.
"""

from siftune.integrations.swift import register

register()
