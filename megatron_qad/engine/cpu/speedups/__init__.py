"""What makes demos on a CPU faster and changes no result. Nothing of the product needs it."""
