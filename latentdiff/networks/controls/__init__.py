"""What steers a backbone beside the prompt: a control is a function from backbones to backbones."""
