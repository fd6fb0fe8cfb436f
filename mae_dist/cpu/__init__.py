"""How this package uses a CPU well. Nothing here touches a GPU or TPU."""
