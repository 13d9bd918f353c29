"""Oumi imports this file by its path (OUMI_EXTRA_DEPS_FILE); every trainer that fine-tunes on rows is sifted from then on.

The selector's options are those of the YAML file that SIFTUNE_CONFIG names.
"""

from siftune.integrations.oumi import register

register()
