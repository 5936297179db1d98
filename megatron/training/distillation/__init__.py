"""Knowledge distillation: training on a teacher's distributions beside the text itself."""
