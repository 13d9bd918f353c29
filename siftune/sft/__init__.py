"""FINE-TUNING BY A RECIPE: one YAML file becomes rows of tokens and a live `trl.SFTTrainer`."""
