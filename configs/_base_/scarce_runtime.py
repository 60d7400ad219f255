_base_ = './default_runtime.py'

visualizer = dict(type='LabelSizeVisualizer')  # labels and predictions have 256 x 256 pixels, whatever the pictures
