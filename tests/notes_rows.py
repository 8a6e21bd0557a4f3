"""The table behind docs/coverage.md: what each of the five notes teaches, what it is here, and what shows it."""

from typing import NamedTuple

FIRST = "examples/notes/first_steps.py::"
WORK = "examples/notes/workflow.py::"
CNN = "examples/notes/regression_to_cnn.py::"
AUTO = "examples/notes/autograd_and_classifier.py::"
GRAPH = "examples/notes/graph_and_structure.py::"


class Row(NamedTuple):
    taught: str
    here: str
    evidence: tuple[str, ...]


NOTES: dict[str, tuple[Row, ...]] = {
    "000, first steps": (
        Row(
            "making tensors: empty, random, zeros, from values, like another; `view`",
            "torch; `fnn.random` for what is random",
            (FIRST + "making_tensors", FIRST + "changing_shapes", "tests/test_random.py::test_equals_jax"),
        ),
        Row(
            "`requires_grad`, `grad_fn`, `backward()` of a scalar",
            "`fnn.grad`: 2.25 everywhere",
            (FIRST + "backward_of_a_scalar", "tests/test_diff_transforms.py::test_gradients_in_closed_form"),
        ),
        Row(
            "`y.backward(v)` of a vector",
            "`fnn.vjp`: [4, 2]",
            (FIRST + "backward_of_a_vector", "tests/test_diff_transforms.py::test_call_forms"),
        ),
        Row(
            "`no_grad`",
            "arguments that are not asked for, `tree.partition`, `detach`, `fnn.stop_gradient`",
            (
                FIRST + "stopping_the_gradient",
                "tests/test_tree.py::test_partition_and_combine",
                "tests/test_custom_rules.py::test_stop_gradient_in_every_mode",
            ),
        ),
        Row(
            "the Jacobian of [x1^2, x2^2], and v J",
            "`fnn.jacobian`, `fnn.vjp`: diag(2 x), 2 v x",
            (FIRST + "jacobian_matrix", "tests/test_diff_jacobian.py::test_jacobians_in_closed_form"),
        ),
        Row(
            "a LeNet, mean squared error, SGD, five epochs",
            "`models.lenet5`, `losses.mse`, `optim.sgd`, `train.make_step`: the losses of the module loop to 1e-5",
            (
                FIRST + "the_smallest_network",
                "tests/test_nn.py::test_lenet_is_the_notes_network",
                "tests/test_step.py::test_compiled_lenet_equals_a_torch_module_loop_over_50_steps",
            ),
        ),
        Row(
            "the plan: data, MNIST and CIFAR-10",
            "`fnn.data`, `examples/train_image.py`",
            (
                "tests/test_train_image.py::test_lenet_on_mnist_reaches_98_percent_twice_the_same",
                "tests/test_train_image.py::test_cifar10_with_augmentation_and_tensorboard",
                AUTO + "training_a_classifier",
            ),
        ),
    ),
    "001, the workflow": (
        Row(
            "installing for a CUDA version; choosing cuda, mps or cpu",
            'the README; `device="auto"`, `train.device`',
            (WORK + "choosing_a_device", "README.md#install"),
        ),
        Row(
            "tensors, `matmul`, `mul`, shapes and devices",
            "torch; `ops.matmul`",
            (WORK + "tensors", "tests/test_ops.py::test_a_whole_step_with_the_operators_equals_torchs"),
        ),
        Row(
            "the gradient of binary cross entropy of x @ w + b",
            "`losses.binary_cross_entropy_with_logits`, `fnn.value_and_grad`",
            (WORK + "autograd", "tests/test_losses.py::test_equals_torch"),
        ),
        Row(
            "Flatten and 784-512-512-10; printing the model",
            "`models.mlp`, `fnn.summary`",
            (WORK + "a_model", "tests/test_nn.py::test_printing"),
        ),
        Row(
            "a `Dataset` of one's own, `DataLoader`, the shapes of a batch",
            "`data.Loader` over arrays or any `Dataset`",
            (WORK + "dataset_and_loader", "tests/test_data_workflow.py::test_batches_of_a_dataset_of_one_s_own"),
        ),
        Row(
            "train loop and test loop, `train()` and `eval()`",
            "`train.fit`, `train.evaluate`, `train=`",
            (
                WORK + "train_loop_and_test_loop",
                WORK + "train_and_eval_modes",
                "tests/test_fit.py::test_fit_learns_and_records",
                "tests/test_fit.py::test_evaluate_is_exact_over_a_ragged_last_batch",
            ),
        ),
        Row(
            "saving and loading a `state_dict`",
            "`interop.save_safetensors`, `to_state_dict`, `from_state_dict`, `save_pth`, `load_pth`",
            (
                WORK + "saving_and_loading",
                "tests/test_interop_pth.py::test_a_module_loads_what_fnn_saved_and_back",
                "tests/test_safetensors.py::test_random_trees_come_back_bit_for_bit",
            ),
        ),
        Row(
            "TensorBoard's `add_scalar`",
            "`train.TensorBoard`",
            (
                WORK + "tensorboard_curves",
                "tests/test_train_callbacks.py::test_scalars_are_read_back_by_tensorboard_s_reader",
            ),
        ),
        Row(
            "finding a shape mismatch",
            "errors that name the layer, the leaf and both shapes",
            (
                WORK + "shapes_that_do_not_fit",
                "tests/test_nn.py::test_errors_name_the_layer_and_its_path",
                "tests/test_step.py::test_bad_input_is_reported_by_the_line_that_knows",
            ),
        ),
        Row(
            "`Resize`, `CenterCrop`, `ToTensor`",
            "torchvision's v2 transforms in the `Dataset`, `data.augment` on batches",
            (WORK + "image_transforms", "tests/test_data_workflow.py::test_torchvision_s_transforms_run_in_the_loader"),
        ),
    ),
    "002, regression to CNNs": (
        Row(
            "MNIST by 784-256-64-10, SGD with momentum, squared error of one-hot labels; pictures and a curve",
            "`examples/train_image.py --model mlp --loss mse --optimizer sgd`; `History.plot`",
            (
                CNN + "handwritten_digits",
                "tests/test_train_image.py::test_the_note_s_mnist_network",
                "tests/test_train_image.py::test_mse_on_one_hot_with_momentum",
                "tests/test_examples_notes.py::test_regression_on_real_mnist",
            ),
        ),
        Row(
            "types, indexing, shapes, broadcasting, cat and split, mathematics, norms, topk, where, gather",
            "torch, under `fnn.vmap` as one by one",
            (CNN + "tensors_under_vmap",),
        ),
        Row(
            "sigmoid, tanh, ReLU and their derivatives",
            "`fnn.nn`, `fnn.grad`: s (1 - s), 1 - t^2",
            (CNN + "activations", "tests/test_nn.py::test_layer_equals_torch_in_value_gradient_and_state"),
        ),
        Row(
            "the gradient of a squared error, `w = 2`",
            "`fnn.value_and_grad`: loss 1, gradient 2",
            (CNN + "mse_gradient", "tests/test_losses.py::test_every_derivative_agrees"),
        ),
        Row(
            "the Jacobian of softmax",
            "`fnn.jacobian(nn.softmax)`: diag(p) - p p^T",
            (CNN + "softmax_jacobian",),
        ),
        Row(
            "the perceptron, one output and many",
            "`fnn.grad`: 2 / K (O - t) O (1 - O) x",
            (CNN + "perceptron",),
        ),
        Row("the chain rule", "`fnn.grad`, `fnn.jvp`: 2", (CNN + "chain_rule",)),
        Row(
            "Himmelblau's function by Adam, and its surface",
            "`examples/himmelblau.py`: from (0, 0) to (3, 2), f < 1e-6, other starts to the other minima",
            ("examples/himmelblau.py::main", "tests/test_examples_notes.py::test_himmelblau"),
        ),
        Row(
            "logistic regression, three layers by hand",
            "functions of a list of dicts, as the torch code has it",
            (CNN + "logistic_regression",),
        ),
        Row(
            "the GPU",
            "trees on a device",
            (CNN + "to_device", "tests/gpu/test_cuda.py::test_the_compiled_step_equals_eager_and_the_cpu"),
        ),
        Row(
            "Visdom",
            "`train.TensorBoard` and PNG curves",
            (
                CNN + "curves",
                "tests/test_fit.py::test_history_writes_csv_and_png",
                "docs/notes.md#5-gpu-6-visdom",
            ),
        ),
        Row(
            "training, validation and test parts; k folds",
            "`data.split`, `data.KFold`",
            (
                CNN + "splits",
                "tests/test_data.py::test_split_puts_every_example_into_exactly_one_part",
                "tests/test_data_kfold.py::test_folds_are_disjoint_and_cover_everything",
                "tests/test_data_kfold.py::test_folds_are_a_function_of_the_key",
            ),
        ),
        Row(
            "L1 and L2, weight decay, momentum, `ReduceLROnPlateau`",
            "`losses.l1_penalty`, `l2_penalty`, `optim.sgd`, `optim.reduce_on_plateau`",
            (
                CNN + "regularization",
                CNN + "momentum_and_learning_rate_decay",
                "tests/test_losses.py::test_penalties",
                "tests/test_losses.py::test_l2_penalty_equals_weight_decay",
                "tests/test_optim_table.py::test_equals_torch",
                "tests/test_optim_transforms.py::test_reduce_on_plateau_equals_torch_step_for_step",
            ),
        ),
        Row(
            "early stopping, dropout",
            "`train.EarlyStopping`, `nn.Dropout`",
            (
                CNN + "early_stopping",
                CNN + "dropout",
                "tests/test_train_callbacks.py::test_it_stops_in_time_and_goes_back_to_the_best",
                "tests/test_nn.py::test_dropout_keeps_the_mean_and_is_the_identity_in_evaluation",
            ),
        ),
        Row(
            "augmentation: flip, rotate, scale, crop, noise",
            "`data.augment`, by a key",
            (
                CNN + "augmentation",
                "tests/test_data_augment.py::test_same_key_same_batch_and_another_key_another",
            ),
        ),
        Row(
            "Conv2d, pooling, BatchNorm; LeNet-5, VGG, GoogLeNet, ResNet",
            "`fnn.nn`, `fnn.models`: torch's and torchvision's values from the same weights",
            (
                CNN + "convolution_pooling_and_batch_norm",
                CNN + "classic_networks",
                "tests/test_nn_conv.py::test_equals_torch",
                "tests/test_nn_norm.py::test_equals_torch",
                "tests/test_models_torchvision.py::test_names_and_shapes_are_torchvisions",
                "tests/test_models_torchvision.py::test_forward_and_one_step_of_sgd_equal_torchvisions",
            ),
        ),
        Row(
            "parameters, modules, moving, saving; a Flatten and a Linear of one's own",
            "`tree.paths`, `fnn.summary`, `interop`, a frozen dataclass",
            (CNN + "layers_of_ones_own", "tests/test_nn.py::test_custom_layer_and_partial"),
        ),
    ),
    "003, CIFAR-10": (
        Row("memory shared with numpy, devices", "torch", (AUTO + "tensors_and_numpy",)),
        Row(
            "a pretrained resnet18, one step of SGD",
            "`interop.from_module`, `models.resnet18`: torch's output and step to 1e-4",
            (
                AUTO + "one_step_of_resnet18",
                "tests/test_models_torchvision.py::test_forward_and_one_step_of_sgd_equal_torchvisions",
                "tests/test_interop_torchvision.py::test_torchvisions_models",
            ),
        ),
        Row("Q = 3 a^3 - b^2 with an external gradient", "`fnn.vjp`: [36, 81], [-12, -8]", (AUTO + "differentiation",)),
        Row(
            "freezing: only what requires a gradient is trained",
            "`optim.freeze`, `tree.partition`: bit for bit, weight decay included",
            (AUTO + "freezing", "tests/test_optim_transforms.py::test_frozen_leaves_stay_bit_for_bit"),
        ),
        Row(
            "the commented LeNet, its loss, the update rule by hand",
            "`nn.Block`, `losses.mse`, `p - lr * g`: equal to `optim.sgd`",
            (AUTO + "define_the_network", AUTO + "loss_and_the_simplest_update"),
        ),
        Row(
            "SGD, Nesterov, Adam, RMSProp",
            "`fnn.optim`: 100 steps of `torch.optim`",
            (AUTO + "update_rules", "tests/test_optim_table.py::test_equals_torch"),
        ),
        Row(
            "a CIFAR-10 classifier in five steps",
            "`data.cifar10`, `examples/train_image.py --data cifar10`",
            (
                AUTO + "training_a_classifier",
                "tests/test_train_image.py::test_cifar10_with_augmentation_and_tensorboard",
                "tests/test_data_cifar10.py::test_the_files_are_read_as_the_format_says",
            ),
        ),
    ),
    "004, graph, structure, einsum": (
        Row(
            "the dynamic graph, freed by `backward()`; `retain_graph`",
            "a function is differentiated as often as one likes; a pullback is called twice",
            (GRAPH + "graph_that_is_not_kept",),
        ),
        Row(
            "a `MyReLU` with its own backward",
            "`fnn.custom_vjp`: [[4.5, 4.5]], [[4.5]], also compiled, under `vmap` and `jacobian`",
            (
                GRAPH + "a_function_with_its_own_backward",
                "tests/test_custom_rules.py::test_my_relu_of_the_notes",
            ),
        ),
        Row(
            "leaves, `retain_grad`, `register_hook`",
            "`fnn.tap`, `fnn.tap_grads`: -4, 4, 1, and 4",
            (
                GRAPH + "gradients_of_what_lies_between",
                "tests/test_taps.py::test_tap_grads_of_a_worked_example",
                "tests/test_taps.py::test_tap_grads_is_what_retain_grad_is",
            ),
        ),
        Row(
            "the graph in TensorBoard",
            "`train.TensorBoard(graph=True)`",
            (
                GRAPH + "graph_in_tensorboard",
                "tests/test_train_callbacks.py::test_the_graph_event_holds_the_step_by_layer",
            ),
        ),
        Row(
            "five levels, from hardware to the high-level interface",
            "the floors, from `triton_kernels` to `train.fit`",
            ("docs/notes.md#5-the-five-levels",),
        ),
        Row(
            "creation, slices, dimensions, scalars, vectors, matrices, eigenvalues, singular values",
            "torch, with the values of the note, under transforms",
            (
                GRAPH + "creation",
                GRAPH + "slicing",
                GRAPH + "dimensions",
                GRAPH + "scalar_vector_and_matrix_operations",
            ),
        ),
        Row(
            "einsum in eight forms, bilinear, attention by scaled dot products",
            "`nn.Bilinear`, `nn.MultiHeadAttention`, `ops.matmul`, `ops.softmax`; the timing in `benchmarks/`",
            (
                GRAPH + "einsum",
                "tests/test_nn_embedding.py::test_bilinear_equals_torch",
                "tests/test_nn_attention.py::test_equals_torch_by_name_in_value_and_gradient",
                "benchmarks/bilinear.py::main",
            ),
        ),
        Row("broadcasting", "torch; `fnn.vmap` says which axis", (GRAPH + "broadcasting",)),
        Row(
            "Parameter, ParameterList, ParameterDict, `named_parameters`",
            "dicts and lists, `tree.paths`: the same names and shapes",
            (GRAPH + "parameters", "tests/test_tree.py::test_paths_follow_insertion_order"),
        ),
        Row(
            "`children`, `named_children`, `modules`",
            "the `children` of containers, `tree.paths`",
            (GRAPH + "modules_and_summary",),
        ),
        Row(
            "freezing the embedding",
            "`optim.freeze`: 10,625 trainable, 30,000 frozen",
            (
                GRAPH + "freezing_the_embedding",
                "tests/test_summary.py::test_frozen_leaves_are_counted_apart",
                "tests/test_optim_transforms.py::test_no_gradient_is_computed_for_frozen_layers",
            ),
        ),
        Row(
            "torchkeras's summary",
            "`fnn.summary`: the same table, character for character",
            (GRAPH + "modules_and_summary", "tests/test_summary.py::test_the_table_of_the_notes"),
        ),
        Row(
            "`Dataset`, `DataLoader`, worker processes",
            "`data.Loader(workers=)`: the order does not depend on their number",
            (GRAPH + "dataset_and_workers", "tests/test_data.py::test_workers_do_not_change_the_batches"),
        ),
    ),
}
