"""How good a posterior is: draw beside the prior, summarise, show, write; what is computed is in one file each."""
