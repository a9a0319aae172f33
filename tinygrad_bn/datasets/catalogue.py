"""The known data sets: their files, SHA-256 hashes and mirrors.

The hash of a file is that of its decompressed contents, since copies are compressed in different ways: Debian's gzip
files differ from the publisher's. Downloaded archives have a second hash, so that a damaged one never enters the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad_bn.datasets.files import File


@dataclass(frozen=True)
class Known:
    """A data set: the files of each part (images and labels, or one CSV table), and where to find them.

    mirrors: base URLs of the downloads; empty if the data set comes with the package.
    installed: the folder below share/datasets in which a Linux distribution installs it.
    offline: advice for error messages when there is no network.
    white: the largest possible pixel value.
    """

    parts: dict[str, tuple[File, ...]]
    classes: tuple[str, ...]
    mirrors: tuple[str, ...] = ()
    installed: str = ""
    offline: str = ""
    white: int = 255


_DIGITS = tuple("0123456789")

KNOWN = {
    "mnist5k": Known(
        {
            "train": (
                File("mnist5k-images-idx3-ubyte", "1d63efb4ac5ab122c73fed605a3f2897fe3ede87e9b4e9fe369abbdd36dad1e7"),
                File("mnist5k-labels-idx1-ubyte", "d212e5beab3667d7fe028273e33cf4cd1e584108be3fdcc5dde1f59e74a2a558"),
            )
        },
        _DIGITS,
    ),
    "digits": Known(
        {
            "train": (
                File("digits-images-idx3-ubyte", "359cd13f0f514122884198b78a131df597421cbf5e93a76678fa96fc548f0d96"),
                File("digits-labels-idx1-ubyte", "ce71631c1f31ce56fa54f31d1d498fafacff59b001e6c30c4a5e29508aa277ad"),
            )
        },
        _DIGITS,
        white=16,
    ),
    "iris": Known(
        {"train": (File("iris.csv", "f7fac79ad999fd2d001fd012dd70c0f42c738a7e7cfb7069e71371b55c29341e"),)},
        ("setosa", "versicolor", "virginica"),
    ),
    "titanic": Known(
        {"train": (File("titanic.csv", "5ed08c12b0ea6ee7a8847b58eed6f2494b849515442069fc7ed365b1d34027af"),)},
        ("died", "survived"),
    ),
    # The archives' hashes are those of TensorFlow Datasets 4.9.10 (url_checksums/mnist.txt), which uses the first
    # mirror; the second is torchvision 0.29.1's. Many projects publish these hashes of the contents, for
    # example zml's build the one of t10k-images.
    "mnist": Known(
        {
            "train": (
                File(
                    "train-images-idx3-ubyte",
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                File(
                    "train-labels-idx1-ubyte",
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
            ),
            "test": (
                File(
                    "t10k-images-idx3-ubyte",
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                File(
                    "t10k-labels-idx1-ubyte",
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            ),
        },
        _DIGITS,
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://raw.githubusercontent.com/fgnt/mnist/master/",
        ),
        offline="use mnist5k, 5,000 of its training images, which come with the package",
    ),
    # The archives' hashes are those of TensorFlow Datasets 4.9.10 (url_checksums/fashion_mnist.txt), which uses the
    # first mirror, the publisher's own; the second is the publisher's repository. The contents' hashes were computed
    # from Debian's package dataset-fashion-mnist 0.0~git20200523.55506a9-1.
    "fashion_mnist": Known(
        {
            "train": (
                File(
                    "train-images-idx3-ubyte",
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                File(
                    "train-labels-idx1-ubyte",
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
            ),
            "test": (
                File(
                    "t10k-images-idx3-ubyte",
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                File(
                    "t10k-labels-idx1-ubyte",
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            ),
        },
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        installed="fashion-mnist",
        offline="on Debian and derivatives, install the package dataset-fashion-mnist",
    ),
}


# The user's own files, with MNIST's file names.
OWN = Known({part: tuple(File(file.name) for file in files) for part, files in KNOWN["mnist"].parts.items()}, ())
