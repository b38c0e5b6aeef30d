"""Settings with which a step does all that it can."""

EVERYTHING = (
    "--data.source=synthetic:16x16x3x640",
    "--train.batch_size=32",
    "--train.micro_batch_size=16",
    "--train.ema_decay=0.9",
    "--train.label_smoothing=0.1",
    "--optim.clip_norm=1",
    "--optim.l1=0.001",
    "--optim.weight_decay=0.01",
    "--augment.crop_padding=2",
    "--augment.flip=true",
    "--augment.vertical_flip=true",
    "--augment.rotation=5",
    "--augment.perspective=0.1",
    "--augment.resized_crop=0.5",
    "--augment.jitter=[0.1,0.1,0.1,0.1]",
    "--augment.grayscale=0.1",
    "--augment.blur=0.1",
    "--augment.noise=0.1",
    "--augment.erasing=0.1",
    "--augment.mixup=0.2",
    "--augment.cutmix=1",
)
NETWORKS = {
    "fashion_cnn": ("--model.name=fashion_cnn", "--model.dropout=0.1", "--model.noise=0.1"),
    "resnet": ("--model.name=timm/test_resnet", "--model.drop_path=0.1"),
}
