"""The public verbs, one file each; how the parts join into a plan."""
